"""Serves a model over HTTP, in the form of OpenAI's API. All but the scheduler and its jobs needs the extra `serve`."""
