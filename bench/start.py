"""Where the process of a case starts: it watches its parent from the first moment, since `child` imports for long."""

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """Ends this session, with loader and compiler workers, when the parent is gone and with it the end of its pipe."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    order = sys.stdin.readline()
    threading.Thread(target=end_with_parent, daemon=True).start()

    from .child import main
    from .order import Order

    main(Order.from_json(order))
    # taking down CUDA, DALI and the compiler's workers in order takes six seconds on an H200; the parent ends them
    os._exit(0)
