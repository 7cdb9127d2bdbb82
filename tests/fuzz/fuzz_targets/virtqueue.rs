//! Fuzz target: a guest's memory with a virtqueue and block requests in it. See `vold::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vold::fuzz::virtqueue(data));
