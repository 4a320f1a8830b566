"""The ledger: where a run's files lie, how they are published, and which seeds they are made with."""

from kdrl_core.config.paths import artifacts_root, default_run_name, validate_run_name
from kdrl_core.ledger.graph import checkpoint_label, checkpoint_step
from kdrl_core.ledger.heal import find_intact, find_own, required_sha256, verify_own
from kdrl_core.ledger.identity import Outside
from kdrl_core.ledger.lock import lock_holder, require_free, run_lock
from kdrl_core.ledger.manifest import (
    Listing,
    Manifest,
    digest,
    holds_lock,
    is_current,
    is_published,
    listing,
    manifest_of,
    model_identity,
    published_below,
    verify_published,
)
from kdrl_core.ledger.names import RunPaths, derive_seed, prompts_of_step, uniforms
from kdrl_core.ledger.publish import (
    ConstantFiles,
    adopt_published,
    publish_directory,
    publish_file,
    replace_file,
    require_writable,
    retract,
    storage_errors,
    sweep_temporaries,
    write_hashed,
)
from kdrl_core.ledger.run import (
    Run,
    adopted,
    create_run,
    list_runs,
    note,
    open_run,
    open_run_dir,
    outside_of,
    record_adoption,
    require_resumable,
    require_same_outside,
    require_same_recipe,
    settle_outside,
)

__all__ = [
    "ConstantFiles", "Listing", "Manifest", "Outside", "Run", "RunPaths", "adopt_published", "adopted",
    "artifacts_root", "checkpoint_label", "checkpoint_step", "create_run", "default_run_name", "derive_seed", "digest",
    "find_intact", "find_own", "holds_lock", "is_current", "is_published", "list_runs", "listing", "lock_holder",
    "manifest_of", "model_identity", "note", "open_run", "open_run_dir", "outside_of", "prompts_of_step",
    "publish_directory", "publish_file", "published_below", "record_adoption", "replace_file", "require_free",
    "require_resumable", "require_same_outside", "require_same_recipe", "require_writable", "required_sha256",
    "retract", "run_lock", "settle_outside", "storage_errors", "sweep_temporaries", "uniforms", "validate_run_name",
    "verify_own", "verify_published", "write_hashed",
]  # fmt: skip
