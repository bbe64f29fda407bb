//! See `margay_fuzz::targets::cni`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::cni(data));
