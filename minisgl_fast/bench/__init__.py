"""``minisgl-fast bench``: a load tester for servers that speak OpenAI's API over HTTP.

    datasets, traces, vocabulary   what is asked: samples, made lazily from a seed
    arrivals                       when: seconds from the start
    endpoint                       a sample as the bytes of an HTTP request
    client, reader                 the event loop and the response parser
    results, samples               what was measured, in bounded memory
    report, charts, page           table, JSON and HTML
    tools                          fronts of the scripts that measure the engine and the kernels

Rules: no torch, no numpy; nothing here is imported by the server.
"""
