//! Fuzz target: NBD requests after the handshake. See `vold::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vold::fuzz::transmission(data));
