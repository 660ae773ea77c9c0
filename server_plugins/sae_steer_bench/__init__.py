"""What steering costs a server, measured over HTTP: load, interleaved rounds, ratios with intervals, a report."""
