"""What a notebook shows: live progress, tables, frames and pictures of a run. Drawn from `run.json` and manifests."""
