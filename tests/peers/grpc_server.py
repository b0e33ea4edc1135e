"""A gRPC server on the C core, for the tests: messages are plain bytes, so that no code has to be generated.

    grpc_server.py [KEY.pem CERTIFICATE.pem]

It takes a free port and says on standard output which; later it says there what happened to calls, a line each.

    Say     unary    the same message; `unknown` is NOT_FOUND with details, `never` waits until it is given
                     up, `deadline` tells how much time the call has
    Early   unary    is refused before any message
    Repeat  1 to n   three times the same, then OUT_OF_RANGE; `forever`: once, then waits until it is given up
    Join    n to 1   all messages in one
    Echo    n to n   each message as it comes
"""

import sys
import threading
from concurrent import futures

import grpc

MESSAGE_BYTES = 16 << 20


def tell(line):
    print(line, flush=True)


def never_ends(context, name):
    """Tells when the call is given up, and returns a function that waits for it."""
    over = threading.Event()

    def given_up():
        tell("given up " + name)
        over.set()

    if not context.add_callback(given_up):
        given_up()
    return lambda: over.wait(60)


def say(request, context):
    if request == b"never":
        never_ends(context, "say")()
    context.send_initial_metadata(tuple(pair for pair in context.invocation_metadata() if pair.key.startswith("x-")))
    if request == b"unknown":
        context.set_trailing_metadata((("x-why", "no such word"), ("x-raw-bin", b"\x00\xff")))
        context.abort(grpc.StatusCode.NOT_FOUND, "kein Wort: Gruß, 100 %\n")
    if request == b"deadline":
        return b"%.3f" % context.time_remaining()
    context.set_trailing_metadata((("x-after", "said"),))
    return request


def early(request, context):
    context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")


def repeat(request, context):
    if request == b"forever":
        wait = never_ends(context, "repeat")
        yield request
        wait()
        return
    for _ in range(3):
        yield request
    context.abort(grpc.StatusCode.OUT_OF_RANGE, "three is enough")


def join(requests, context):
    return b"".join(requests)


def echo(requests, context):
    yield from requests


HANDLERS = {
    "Say": grpc.unary_unary_rpc_method_handler(say),
    "Early": grpc.unary_unary_rpc_method_handler(early),
    "Repeat": grpc.unary_stream_rpc_method_handler(repeat),
    "Join": grpc.stream_unary_rpc_method_handler(join),
    "Echo": grpc.stream_stream_rpc_method_handler(echo),
}


def main():
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=120), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peer", HANDLERS),))
    if len(sys.argv) == 3:
        key, certificate = (open(path, "rb").read() for path in sys.argv[1:])
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tell("listening on %d" % port)
    # Ends with the test that started it.
    sys.stdin.read()
    server.stop(None)


main()
