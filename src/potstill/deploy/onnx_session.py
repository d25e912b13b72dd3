"""onnxruntime with our settings.  No torch here."""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from potstill.errors import ArtifactError, UsageError

_ONLY_ERRORS = 3  # onnxruntime's scale of log levels


def answering(content: bytes, *, threads: int = 0, patient: bool = False) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function from a batch, as the model takes it, to logits [B, K].

    Args:
        content: of an ONNX file; what it refers to outside of itself is not there.
        threads: for one image; 0: as many as cores.
        patient: threads that wait do not spin, so that other engines which take turns with this one are not slowed.

    Raises:
        UsageError: onnxruntime is not installed.
        ArtifactError: onnxruntime cannot use it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        needs = "an ONNX model needs onnxruntime, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[export]", or pip install onnxruntime') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = threads
    if patient:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArtifactError(f"onnxruntime cannot use this model: {line[:300]}") from error
    (taken,) = session.get_inputs()

    def answer(batch: NDArray[Any]) -> NDArray[Any]:
        (logits,) = session.run(None, {taken.name: batch})
        found: NDArray[Any] = logits
        return found

    return answer
