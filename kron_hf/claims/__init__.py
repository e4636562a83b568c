"""What a model card claims, in a file that a machine can read and count again: `kron_claims.json`."""

from kron_hf.claims.count import LayerZeros, count, merge_difference, set_frozen, zeros_of
from kron_hf.claims.files import FileClaim, claimed_files, file_claim
from kron_hf.claims.record import CLAIMS_FILE, Claims, MetricClaim, read_claims, write_claims

__all__ = [
    "CLAIMS_FILE",
    "Claims",
    "FileClaim",
    "LayerZeros",
    "MetricClaim",
    "claimed_files",
    "count",
    "file_claim",
    "merge_difference",
    "read_claims",
    "set_frozen",
    "write_claims",
    "zeros_of",
]
