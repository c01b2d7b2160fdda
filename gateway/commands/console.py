"""`console`: lets a browser sign in to the console of a running gateway."""

from __future__ import annotations

from gateway.commands.options import ConfigOption, KeyOption, OutputOption, UrlOption, connect
from gateway.commands.terminal import Output, note, result


def console(
    url: UrlOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Print a URL that signs a browser in to the console.

    The URL holds a code that is valid once, for five minutes. The browser then has the access of the key or
    token that this command used, for twelve hours or until the gateway restarts. What everybody may see needs
    no sign-in: open the gateway's URL.
    """
    with connect(url, admin_key_file, config) as client:
        found = client.call("POST", "/console/codes")
        address = f"{client.url}{found['path']}"
    result(output, {"url": address}, address)
    note("open it in a browser: it signs in once, within five minutes")
