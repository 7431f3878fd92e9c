"""Hands a command to ``command_server.py`` and exits as it does.

Run by the programs of :mod:`tests.docs.shell` without ``site``: imports little.
"""

import json
import os
import socket
import struct
import sys

HEADER = struct.Struct("!i")


def main() -> int:
    """Send the arguments after the first one, which is the socket.

    :returns: The exit code of the command.
    """
    path, *argv = sys.argv[1:]

    request = {
        "argv": argv,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
    }
    content = json.dumps(request).encode()

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [HEADER.pack(len(content))], [0, 1, 2])
        connection.sendall(content)

        answer = connection.recv(HEADER.size)

    if not answer:
        sys.stderr.write(f"{argv}: the command server is gone\n")

        return 70

    exit_code: int = HEADER.unpack(answer)[0]

    # As a shell says that a signal ended it.
    return 128 - exit_code if exit_code < 0 else exit_code


if __name__ == "__main__":
    sys.exit(main())
