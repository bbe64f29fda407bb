//! Watches the API once, computes what each node must enforce, and streams deltas.
