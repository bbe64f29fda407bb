//! See `margay_fuzz::targets::up`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::up(data));
