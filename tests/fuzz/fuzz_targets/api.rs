//! Fuzz target: calls of the control API. See `vold::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vold::fuzz::api(data));
