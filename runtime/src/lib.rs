//! How a process lives: telemetry, admin port, readiness, shutdown, TLS reload, backoff.
