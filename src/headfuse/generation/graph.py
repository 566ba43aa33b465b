"""Recording work without gradients as a CUDA graph."""

from collections.abc import Callable

import torch

# Runs as it is before the recording: they compile, and allocate what lasts.
WARM_UP = 3


def record(function: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph whose replay does what `function` does, which must depend on nothing of the host that changes."""
    with torch.cuda.device(device):
        # Both on a stream of their own, as recording asks for.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a progress bar's, a pinning allocator's) may talk to the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    return graph
