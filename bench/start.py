"""Where the process of a case starts: it watches its parent from the first moment, since `child` imports for long.

Of a case on several GPUs this is the process of torchrun's agent, which starts the ranks, processes like this one.
"""

import json
import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """Ends this session, with loader and compiler workers, when the parent is gone and with it the end of its pipe."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    is_rank = len(sys.argv) > 1
    text = sys.argv[1] if is_rank else sys.stdin.readline()
    threading.Thread(target=end_with_parent, daemon=True).start()

    from . import parallel
    from .order import Order

    order = Order.from_json(text)
    if is_rank:
        parallel.see_own_gpu()
    if order.case.gpus > 1 and not is_rank:
        failure = parallel.launch(text, order.case.gpus, order.restarts)
        if failure is not None:
            print("\n" + json.dumps(failure), flush=True)  # a rank may have been ended within a line
    else:
        from .child import main

        main(order)
    # taking down CUDA, DALI and the compiler's workers in order takes six seconds on an H200; the parent ends them
    os._exit(0)
