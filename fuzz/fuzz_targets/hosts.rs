//! See `margay_fuzz::targets::hosts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::hosts(data));
