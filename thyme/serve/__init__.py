"""The OpenAI-compatible server. Starlette and uvicorn come with the extra `serve`."""
