//! Fuzz target: NBD from the greeting on. See `vold::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vold::fuzz::handshake(data));
