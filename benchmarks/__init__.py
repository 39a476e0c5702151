"""Speed, accuracy and memory of veerloss against its peers: run `python -m benchmarks`."""
