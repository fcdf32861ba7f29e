"""Tensors that ranks share: the failure of a rank is one line."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

from saro.distributed.states import write_tensors
from saro.errors import SaroError


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    """torch raises it as a BaseException with the tracebacks of all ranks."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    expected = r"parts: the part of rank 0 cannot be written \(OSError: \[Errno 28\] No space left on device\); look at"
    with pytest.raises(SaroError, match=expected) as caught:
        write_tensors(tmp_path / "parts", {"a": torch.zeros(2)})
    assert "\n" not in str(caught.value)
