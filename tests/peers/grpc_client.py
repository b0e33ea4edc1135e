"""A gRPC client on the C core, for the tests.

    grpc_client.py ADDRESS

It reads one call a line from standard input, as JSON, and answers with one line of JSON. `call` is `unary`,
`repeat`, `join`, `echo` or `open`; `method` its path; `messages` what is said, as text, or `size` for one message of
so many bytes; `timeout` in seconds; `metadata` pairs; `times` how many calls run at once. `cancel` gives a call up
after so many replies. `open` begins a call that goes both ways; `{"say": TEXT}` then says something and tells the
reply, `{"say": null}` ends it.
"""

import json
import queue
import sys

import grpc

OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.enable_retries", 0)]
CHANNEL = grpc.insecure_channel(sys.argv[1], OPTIONS)


def pairs(metadata):
    return [[key, value.hex() if isinstance(value, bytes) else value] for key, value in metadata or ()]


def outcome(call, replies):
    """How a call went that is over."""
    code = call.code()
    return {
        "code": code.value[0],
        "details": call.details(),
        "initial": pairs(call.initial_metadata()),
        "trailing": pairs(call.trailing_metadata()),
        "replies": replies,
    }


def shown(reply):
    return reply.decode() if len(reply) < 100 else {"bytes": len(reply), "sum": sum(reply)}


def messages(ask):
    if "size" in ask:
        return [bytes(range(256)) * (ask["size"] // 256)]
    return [text.encode() for text in ask.get("messages", [])]


def begin(ask, said):
    kinds = {
        "unary": CHANNEL.unary_unary,
        "repeat": CHANNEL.unary_stream,
        "join": CHANNEL.stream_unary,
        "echo": CHANNEL.stream_stream,
    }
    kind = ask["call"]
    method = kinds[kind](ask["method"])
    options = {"timeout": ask.get("timeout"), "metadata": [tuple(pair) for pair in ask.get("metadata", [])]}
    request = said[0] if kind in ("unary", "repeat") else iter(said)
    return method.future(request, **options) if kind in ("unary", "join") else method(request, **options)


def finish(ask, call):
    replies = []
    try:
        if ask["call"] in ("unary", "join"):
            replies.append(shown(call.result()))
        else:
            for reply in call:
                replies.append(shown(reply))
                if len(replies) == ask.get("cancel"):
                    call.cancel()
    except (grpc.RpcError, grpc.FutureCancelledError):
        pass
    return outcome(call, replies)


class Open:
    """A call that goes both ways, one step at a time."""

    def __init__(self, ask):
        self.said = queue.Queue()
        metadata = [tuple(pair) for pair in ask.get("metadata", [])]
        self.call = CHANNEL.stream_stream(ask["method"])(iter(self.said.get, None), metadata=metadata)

    def say(self, text):
        self.said.put(None if text is None else text.encode())
        try:
            return {"reply": next(self.call).decode()}
        except StopIteration:
            return outcome(self.call, [])
        except grpc.RpcError:
            return outcome(self.call, [])


def main():
    opened = None
    for line in sys.stdin:
        ask = json.loads(line)
        if "say" in ask:
            answer = opened.say(ask["say"])
        elif ask["call"] == "open":
            opened, answer = Open(ask), {}
        else:
            calls = [begin(ask, messages(ask)) for _ in range(ask.get("times", 1))]
            answers = [finish(ask, call) for call in calls]
            answer = answers[0] if len(answers) == 1 else answers
        print(json.dumps(answer), flush=True)


main()
