"""The scheduler: requests, pages, the radix prefix cache, the step plan. Imports nothing of torch."""
