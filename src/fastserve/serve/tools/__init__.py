"""Functions that a model may call: how they are told to it, and how its calls are read.

How a route uses it (nothing here knows of HTTP):

    tools = parse_tools(body["tools"])                      # OptionError names what is wrong
    choice = parse_tool_choice(body.get("tool_choice"), tools)  # a ToolChoice
    format = detect_format(checkpoint.chat_template, tokenizer)  # once a model
    messages, shown = tell_tools(messages, tools, format, choice)
    prompt = encode_chat(model, messages, tools=shown, variables=...)
    params = SamplingParams(
        ...,
        constraint=call_constraint(tools, choice, format, is_parallel=True),  # None: calls are free
        skip_special_tokens=False,  # where tools may be called: what marks a call may be a special token
    )
    parser = ToolParser(format, tools)  # one a completion; not with choice.kind == "none"
    for chunk in stream:
        for event in parser.feed(chunk.text): ...  # TextDelta | CallStart | ArgumentsDelta
    for event in parser.finish(): ...
    parser.has_calls  # finish_reason "tool_calls" where it was "stop"

- `CallStart(index, name)` begins the delta of a call (give it an id), `ArgumentsDelta(index, text)` goes on
  with its arguments, which are the JSON that the model wrote.
- `join_events(events)` is what all of a completion's come to: (text, [Call(name, arguments)]).
- However a completion is cut into pieces, the events joined are the same.
"""
