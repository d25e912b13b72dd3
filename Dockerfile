# `potstill serve` in a container, on the CPU; see docs/serve.md.
FROM python:3.12-slim

# Both from one index: torchvision of PyPI does not fit a torch without CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[serve]" && useradd --create-home potstill
USER potstill

EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import socket, urllib.request; urllib.request.urlopen(f'http://{socket.gethostbyname(socket.gethostname())}:8000/healthz', timeout=5)"]
# The server answers at a known address only: that of the container, whose port is published.
ENTRYPOINT ["sh", "-c", "exec potstill serve \"/runs/$0\" --output-dir /runs --host \"$(hostname -i | cut -d ' ' -f 1)\" --port 8000"]
CMD ["quickstart"]
