"""Sends one request again and again at a steady rate on one connection, and prints how often which status
came.

It imports nothing that is heavy: what it takes is not to be seen beside what it disturbs.

    python -S bench/flood.py '{"url": ..., "key": ..., "body": ..., "rate": 50, "seconds": 5}'
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections import Counter
from urllib.parse import urlsplit


def main() -> None:
    job = json.loads(sys.argv[1])
    connection = http.client.HTTPConnection(urlsplit(job["url"]).netloc, timeout=60)
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


if __name__ == "__main__":
    main()
