"""Fields of OpenAI's older APIs for answers in events."""

from __future__ import annotations

from pydantic import Field

from fastserve.errors import OptionError
from fastserve.serve.schema.body import Body
from fastserve.serve.schema.sampling import SamplingFields


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="End the stream with an event of the tokens used.")


class StreamFields(SamplingFields):
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="With stream.")

    @property
    def has_usage(self) -> bool:
        """Whether the stream ends with the usage.

        Raises:
            OptionError: options of a stream for an answer that is none.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise OptionError(
                "stream_options has no use without stream=true",
                hint="send stream=true as well, or leave it out",
                option="stream_options",
            )
        return bool(self.stream_options.include_usage)
