//! See `margay_fuzz::targets::rule`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::rule(data));
