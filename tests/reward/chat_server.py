"""A real HTTP server on this machine that speaks chat/completions, with faults on demand."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class ChatServer(ThreadingHTTPServer):
    """Answers with what ``reply(texts, pictures, request, attempt)`` returns.

    A text is the content of an answer; a float the seconds to wait before an "8"; bytes a whole body; a triple the
    status, headers and body. ``attempt`` counts the requests with the same messages, from 0. ``seen`` holds (headers,
    request) of every request and ``most`` the largest number at a time. Without ``chat`` any request is answered with
    ``reply()``.
    """

    daemon_threads = True

    def __init__(self, reply, chat=True):
        super().__init__(("127.0.0.1", 0), _Chat)
        self.reply, self.chat, self.seen, self.attempts = reply, chat, [], {}
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Chat(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not server.chat:
            self.answer(server.reply())
            return
        request = json.loads(body)
        with server.lock:
            server.seen.append((dict(self.headers), request))
            server.now += 1
            server.most = max(server.most, server.now)
            key = json.dumps(request["messages"])
            attempt = server.attempts[key] = server.attempts.get(key, -1) + 1
        try:
            assert self.path == "/v1/chat/completions"
            content = request["messages"][-1]["content"]
            texts = [part["text"] for part in content if part["type"] == "text"]
            pictures = [picture(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
            self.answer(server.reply("".join(texts), pictures, request, attempt))
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, reply):
        status, headers = 200, {}
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "8"
        if isinstance(reply, tuple):
            status, headers, reply = reply
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            pass  # the client did not wait

    def log_message(self, *args):
        pass


def picture(url):
    kind, data = url.split(",", 1)
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG",)).convert("RGB")


@contextmanager
def chat_server(reply, chat=True):
    server = ChatServer(reply, chat)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
