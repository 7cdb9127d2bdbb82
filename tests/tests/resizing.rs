//! A volume grows while it is used, never shrinks, and what is beyond its old end reads as zeros.

use vold_tests::Vold;
use vold_tests::content::bytes;
use vold_tests::nbd::{Client, EINVAL, ENOSPC};
use vold_tests::tools::run;

#[test]
fn a_volume_grows_online_and_new_connections_see_it() {
    let mut vold = Vold::start();
    let uri = vold.with_volume(2, "256M", "10M");
    let mut old = Client::connect(&uri);
    let data = bytes(1, 10 << 20);
    for (i, piece) in data.chunks(1 << 20).enumerate() {
        old.write((i as u64) << 20, piece).unwrap();
    }
    assert_eq!(old.write(10 << 20, b"beyond"), Err(ENOSPC));
    assert_eq!(old.read(10 << 20, 512), Err(EINVAL));

    let shown = vold.ctl("volume resize acme/vol --size 50M");
    assert_eq!(shown["size_bytes"], 50 << 20);
    assert_eq!(run("nbdinfo", ["--size", &uri]).trim(), (50 << 20).to_string());
    let mut new = Client::connect(&uri);
    assert_eq!(new.size(), 50 << 20);
    assert!(new.read(10 << 20, 8 << 20).unwrap().iter().all(|byte| *byte == 0));
    new.write((49 << 20) + 7, b"new end").unwrap();
    // The old connection goes on, and may use the room too.
    assert!(old.read(0, 1 << 20).unwrap() == data[..1 << 20]);
    old.flush().unwrap();
    drop((old, new));

    vold.kill();
    vold.restart();
    let mut client = Client::connect(&uri);
    assert_eq!(client.size(), 50 << 20);
    assert_eq!(client.read((49 << 20) + 7, 7).unwrap(), b"new end");
    for (i, piece) in data.chunks(1 << 20).enumerate() {
        assert!(client.read((i as u64) << 20, 1 << 20).unwrap() == piece);
    }
    drop(client);
    vold.stop();
    vold.check_is_clean();
}

#[test]
fn a_volume_does_not_shrink_and_the_refusal_says_what_to_do() {
    let vold = Vold::start();
    let uri = vold.with_volume(1, "128M", "10M");
    let refusal = vold.refused("volume resize acme/vol --size 5M");
    assert_eq!(refusal.code, "invalid");
    for word in ["acme/vol", "shrink", "copy"] {
        assert!(refusal.message.contains(word), "{refusal:?}");
    }
    assert_eq!(run("nbdinfo", ["--size", &uri]).trim(), (10 << 20).to_string());
    // The size it has is no change and no error.
    assert_eq!(
        vold.ctl("volume resize acme/vol --size 10M")["size_bytes"],
        10 << 20
    );
}

#[test]
fn sizes_that_are_no_multiple_of_an_extent_end_exactly_where_they_should() {
    let vold = Vold::start();
    let size = (4 << 20) + 12288;
    let uri = vold.with_volume(2, "128M", &size.to_string());
    let mut client = Client::connect(&uri);
    assert_eq!(client.size(), size);
    client.write(size - 5, b"fives").unwrap();
    assert_eq!(client.write(size - 4, b"fives"), Err(ENOSPC));
    assert_eq!(client.read(size - 5, 5).unwrap(), b"fives");
    assert_eq!(client.read(size - 4, 5), Err(EINVAL));
    // The smallest volume there is.
    vold.ctl("volume create acme/tiny --size 4K --replicas 2");
    let tiny = vold.attach("acme/tiny", "vm1");
    let mut client = Client::connect(&tiny);
    client.write(0, &bytes(3, 4096)).unwrap();
    assert!(client.read(0, 4096).unwrap() == bytes(3, 4096));
    assert_eq!(client.write(4095, b"ab"), Err(ENOSPC));
}
