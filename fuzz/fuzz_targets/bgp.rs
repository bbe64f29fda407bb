//! See `margay_fuzz::targets::bgp`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| margay_fuzz::targets::bgp(data));
