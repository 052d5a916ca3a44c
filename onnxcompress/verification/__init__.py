"""Original against result: metrics, gates, latency, memory."""
