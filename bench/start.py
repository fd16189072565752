"""From process start to the first token, files cached, and the time that `import fastserve` takes."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict

from fastserve.evaluate.estimate import estimate_median
from fastserve.hub.resolve import resolve
from report import DEFAULT_MODEL, make_parser, publish

IMPORT = "from time import perf_counter as now; start = now(); import fastserve; print(now() - start)"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    resolve(arguments.model)  # downloaded now rather than in the first run
    command = [sys.executable, "-m", "fastserve.cli.main", "generate", arguments.model, arguments.prompt]
    command += ["--max-tokens", "1", "--offline"]
    time_generate(command)  # brings the files into memory
    times = [time_generate(command) for _ in range(arguments.runs)]
    first_token = estimate_median([first for first, _ in times])
    whole_process = estimate_median([whole for _, whole in times])
    import_ = estimate_median([time_import() for _ in range(arguments.runs)])
    publish(
        arguments,
        {
            "first_token_seconds": asdict(first_token),
            "process_seconds": asdict(whole_process),
            "import_seconds": asdict(import_),
        },
        [
            ("process start to first token, seconds", first_token),
            ("process start to exit, seconds", whole_process),
            ("import fastserve, seconds", import_),
        ],
    )


def time_generate(command: list[str]) -> tuple[float, float]:
    """Seconds from the start of the process to the first byte of the completion, and to its exit."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode != 0 or not first:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return first_seconds, time.perf_counter() - start


def time_import() -> float:
    """Seconds that the import takes in a fresh interpreter."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()
