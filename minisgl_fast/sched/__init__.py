"""The scheduler: requests, pages, the radix prefix cache, the step plan. Never imports torch."""
