"""The HTTP server: OpenAI's routes, POST /v1/crystals, the page."""
