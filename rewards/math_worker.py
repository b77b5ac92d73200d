"""The process in which math-verify runs: one JSON request a line on standard input, JSON replies on standard output.

Started by :mod:`rewards.math_answers`. A process of its own since an expression such as ``9^9^9^9`` cannot be stopped
from inside Python, and since math-verify keeps time by signals, which only the main thread of a process gets.

A request is ``{"gold": text, "answer": text}``. The replies are ``{"gold": whether it could be read}`` and, if it
could, ``{"right": bool}``.
"""

import functools
import json
import logging
import os
import re
import resource
import sys

MEMORY = 4 << 30
_MATHS = re.compile(r"[\\^_=+*/(){}\[\]|<>]")
_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_WARM_UP = ((r"$\frac{x}{2}$", "$0.5x$"), ("$x^2+1$", "$1+x^2$"), (r"$\sqrt{8}$", "$x=3$"), (r"$\{1,2\}$", "$(1,2)$"))


def main(seconds: int) -> None:
    """Answer requests until standard input ends; whatever the library prints goes elsewhere."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    def read(text: str) -> list:
        # Without marks of LaTeX around it the library looks for numbers only, and finds 2 in 2\sqrt{2}.
        if _MATHS.search(text) and not _MARKED.search(text) and not _WORDS.search(text):
            return parse(f"${text}$", parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)
        return parse(text, parsing_timeout=seconds)

    # The first uses load grammars and parts of sympy, which may take longer than a comparison is given.
    for gold, answer in _WARM_UP:
        verify(parse(gold, parsing_timeout=0), parse(answer, parsing_timeout=0), timeout_seconds=0)
    read_gold = functools.lru_cache(maxsize=1024)(read)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        gold = read_gold(request["gold"])
        replies.write(json.dumps({"gold": bool(gold)}) + "\n")
        if gold:
            right = verify(gold, read(request["answer"]), timeout_seconds=seconds)
            replies.write(json.dumps({"right": bool(right)}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
