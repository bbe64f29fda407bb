//! See `margay_fuzz::targets::policy`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::policy(data));
