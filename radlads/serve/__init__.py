"""The OpenAI-compatible server: requests (schema), the loop that serves them all at once (worker), and HTTP (http)."""
