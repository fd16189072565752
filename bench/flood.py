"""Sends one request again and again at a steady rate on one connection, and prints how often which status
came.

It imports nothing that is heavy: what it takes is not to be seen beside what it disturbs.

    python -S bench/flood.py '{"url": ..., "key": ..., "body": ..., "rate": 50, "seconds": 5}'

Where the url is null, a thread of its own refuses them, for 0.1 ms each: what sending takes, and little else.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections import Counter
from threading import Thread
from urllib.parse import urlsplit

_REFUSAL = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n%s"
_ERROR = b'{"error": {"message": "of tenant \'flood\' requests_per_minute is 6, and used up", "code": "429"}}'


def main() -> None:
    job = json.loads(sys.argv[1])
    address = refuse_here() if job["url"] is None else urlsplit(job["url"]).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps(job["body"]).encode()
    headers = {"Authorization": f"Bearer {job['key']}", "Content-Type": "application/json"}
    statuses: Counter[int] = Counter()
    start = time.perf_counter()
    for number in range(int(job["rate"] * job["seconds"])):
        time.sleep(max(0.0, start + number / job["rate"] - time.perf_counter()))
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        statuses[answer.status] += 1
    print(json.dumps(statuses))


def refuse_here() -> str:
    """The address of a thread that refuses whatever comes on one connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    Thread(target=_refuse, args=(listener,), daemon=True).start()
    return "{}:{}".format(*listener.getsockname())


def _refuse(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    requests = connection.makefile("rb")
    while head := list(iter(requests.readline, b"\r\n")):
        (length,) = (int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length"))
        requests.read(length)
        connection.sendall(_REFUSAL % (len(_ERROR), _ERROR))


if __name__ == "__main__":
    main()
