"""A steered LLaVA for many users at once: the Ray Serve application, its HTTP API and its playground."""
