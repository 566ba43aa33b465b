"""What several kernels want of Gluon: a copy that Triton has renamed, and both ends of an early launch.

A kernel that is launched early (programmatic dependent launch) runs while the one before it still does. What it reads
or writes of that one's must stand behind `wait_for_predecessor`.
"""

# Triton's types are those of plain Python calls, not of a kernel's.
# pyright: reportArgumentType=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 has a new name for it.
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def wait_for_predecessor():
    """Go on when every program of the kernel before this one has ended and its writes are seen."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_successor_begin():
    """Allow the next kernel to be launched as soon as every program of this one has come here."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
