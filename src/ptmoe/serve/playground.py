"""The playground: one page that asks this server's own API, and nothing else."""

import base64
import hashlib
import re
from importlib.resources import files


def playground() -> tuple[bytes, dict[str, str]]:
    """The page, and its headers: only its own style and script are run, it talks to its own origin alone, nothing that
    is shown can become markup, and no other page can hold it in a frame."""
    page = files("ptmoe.serve").joinpath("playground.html").read_bytes()
    style, script = (_hash(page, tag) for tag in (b"style", b"script"))
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(page: bytes, tag: bytes) -> str:
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
