//! Reconciles an Installation into every component: gather, default, validate, render, apply, status.
