#!/bin/bash
# Makes the guests of the tests from distribution packages alone, and prints the directory they are in:
#
#   vm-images/build.sh guest    kernel, initramfs            a guest for qemu -kernel … -initrd …
#   vm-images/build.sh disk     the same, disk.img           a disk that a BIOS and UEFI boot, to be copied onto a volume
#                               and firmware                 UEFI for qemu -bios …
#
# Cached: the directory's name holds a hash of the recipe and of every package's version. Reproducible: the same recipe
# and packages give the same bytes. $VOLD_VM_IMAGES says where (default target/vm-images). README.md explains the rest.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC
# Any fixed time does: 2024-01-01. It is in every file of the guest, and in the file systems of the disk.
export SOURCE_DATE_EPOCH=1704067200

here=$(cd "$(dirname "$0")" && pwd)
cache=${VOLD_VM_IMAGES:-$here/../target/vm-images}
# Debian's PATH of ordinary users leaves these out, and mke2fs is there.
PATH="$PATH:/usr/sbin:/sbin"

say() { echo "vm-images: $*" >&2; }
fail() { say "$*"; exit 1; }

what=${1:-}
[ "$what" = guest ] || [ "$what" = disk ] || { echo "usage: vm-images/build.sh guest|disk" >&2; exit 2; }
arch=$(dpkg --print-architecture) || fail "no dpkg here: the guests are made from Debian or Ubuntu packages"

# Programs of the guest, from the host's installed packages, with the libraries they are linked with.
disk_programs=(busybox nbd-client mke2fs e2fsck resize2fs blkid)
# fio brings 80 MiB of libraries: it is left out of the disk, which a BIOS reads slowly.
programs=("${disk_programs[@]}" fio)
# Kernel modules of the guest; those they need are found and loaded before them. Built into the kernel is as good.
modules=(virtio_pci virtio_blk virtio_net virtio_rng ext4 nbd)
# Packages that are only unpacked here, never installed: the kernel, and what makes an initramfs and a bootable disk.
tools=(cpio)
[ "$what" = guest ] || tools+=(syslinux syslinux-common systemd-boot-efi ovmf mtools dosfstools)
if [ "$what" = disk ] && [ "$arch" != amd64 ]; then
    fail "the disk's boot loader (syslinux) is for x86-64; README.md has the steps for $arch"
fi

# ---- which packages -------------------------------------------------------------------------------------------------

# Debian's and Ubuntu's names of a kernel for virtual machines.
kernel_package() {
    local meta package
    for meta in "linux-image-cloud-$arch" linux-image-virtual; do
        package=$(apt-cache depends --no-recommends "$meta" 2>/dev/null \
            | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | sed -n 1p)
        [ -z "$package" ] || { echo "$package"; return; }
    done
    return 1
}

# The version that would be fetched.
candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: \([0-9]\)/\1/p'; }

resolve() {
    kernel=$(kernel_package) || return 1
    fetched=()
    local package version packages=("$kernel")
    # Ubuntu keeps a kernel's modules apart.
    [ -z "$(candidate "linux-modules-${kernel#linux-image-}")" ] || packages+=("linux-modules-${kernel#linux-image-}")
    for package in "${packages[@]}" "${tools[@]}"; do
        version=$(candidate "$package")
        [ -n "$version" ] || return 1
        fetched+=("$package=$version")
    done
}

update_lists() {
    say "fetching the distribution's package lists (apt-get update)"
    if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; else sudo -n apt-get update -qq; fi >&2 \
        || say "some package lists could not be updated; going on with what is there"
}

# The packages, with versions, that files were installed from; each must be of one. (With /usr merged, a file may be known
# by its other name. One question for all: dpkg reads its whole list for each.)
packages_of() {
    local -A known=()
    local -a names=()
    local file package path
    for file in "$@"; do names+=("$file" "${file#/usr}" "/usr$file"); done
    while IFS= read -r path; do
        package=${path%%: *} path=${path#*: }
        [[ "$package" == diversion* ]] || known[$path]=${package%%,*}
    done < <(dpkg-query --search "${names[@]}" 2>/dev/null)
    for file in "$@"; do
        package=${known[$file]:-${known[${file#/usr}]:-${known[/usr$file]:-}}}
        [ -n "$package" ] || fail "$file is of no package: the guest is made from distribution packages only"
        echo "$package"
    done | sort -u | xargs dpkg-query --show --showformat '${Package}=${Version}\n' | sort -u
}

# A program and the libraries it is linked with, one path a line.
with_libraries() {
    local path
    path=$(command -v "$1") || fail "$1 is not installed; run scripts/setup.sh"
    readlink -f "$path"
    ldd "$path" 2>/dev/null | grep -o '/[^ ]*' || true
}

resolve || { update_lists; resolve; } \
    || fail "no kernel package (linux-image-cloud-$arch) or one of: ${tools[*]}; is main in the apt sources?"

files=$(for program in "${programs[@]}"; do with_libraries "$program"; done | xargs -n 1 readlink -f | sort -u)
mapfile -t files <<<"$files"
installed=$(packages_of "${files[@]}")
recipe=$(cd "$here" && cat build.sh init lib.sh tests/*.sh && ls tests)
manifest=$(printf '%s\n' "arch $arch" "recipe $(sha256sum <<<"$recipe" | cut -c1-64)" "${fetched[@]}" "$installed")
key=$(sha256sum <<<"$manifest" | cut -c1-16)
out=$cache/$what-$key

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
if [ -e "$out/manifest" ]; then
    echo "$(cd "$out" && pwd)"
    exit 0
fi

# ---- fetch and unpack -----------------------------------------------------------------------------------------------

work=$(mktemp -d "$cache/.work-XXXXXX")
trap 'rm -rf "$work"' EXIT

# Packages are kept beside the images, so that a changed recipe fetches nothing.
fetch() {
    local package=$1 file
    mkdir -p "$cache/packages"
    file=$(echo "$cache/packages/${package%%=*}_$(sed 's/^[^=]*=//; s/:/%3a/g' <<<"$package")"_*.deb)
    if ! [ -e "$file" ]; then
        say "fetching $package"
        # (apt cannot lower its privileges into a private directory, and warns.)
        (cd "$work" && apt-get download -qq "$package" 2>&1 | grep -v 'unsandboxed' >&2 || true)
        mv "$work"/*.deb "$cache/packages/" 2>/dev/null || return 1
        file=$(echo "$cache/packages/${package%%=*}_$(sed 's/^[^=]*=//; s/:/%3a/g' <<<"$package")"_*.deb)
    fi
    dpkg-deb -x "$file" "$work/packages"
}

say "building $out"
mkdir "$work/packages"
for package in "${fetched[@]}"; do
    # A list that is older than the archive names packages that are gone.
    fetch "$package" || { update_lists; fetch "$package"; } \
        || fail "$package cannot be fetched; if a newer one has replaced it, run this again"
done
unpacked() { PATH="$work/packages/bin:$work/packages/sbin:$work/packages/usr/bin:$PATH" "$@"; }

# ---- the guest ------------------------------------------------------------------------------------------------------

kernel_version=${kernel#linux-image-}
module_tree=$(echo "$work"/packages{,/usr}/lib/modules/"$kernel_version" | tr ' ' '\n' | while read -r d; do
    [ ! -d "$d" ] || echo "$d"; done | sed -n 1p)
[ -n "$module_tree" ] || fail "$kernel has no modules in it"

find_module() {
    find "$module_tree" -name "$1.ko*" -o -name "${1//_/-}.ko*" -o -name "${1//-/_}.ko*" | sort | sed -n 1p
}

# Copies a module uncompressed, after those it needs, under a name that says when it is loaded.
loaded=" "
add_module() {
    local name=${1//-/_} file depends other
    [[ "$loaded" != *" $name "* ]] || return 0
    loaded+="$name "
    file=$(find_module "$name")
    if [ -z "$file" ]; then
        grep -q "/${name//_/[-_]}\.ko" "$module_tree/modules.builtin" || fail "$kernel has no module $name"
        return 0
    fi
    case $file in
        *.xz) xz -dc "$file" >"$work/module" ;;
        *.zst) zstd -qdc "$file" >"$work/module" ;;
        *.gz) gzip -dc "$file" >"$work/module" ;;
        *) cat "$file" >"$work/module" ;;
    esac
    # The .modinfo section is a list of texts, each ended by a zero byte.
    depends=$(grep -a -z -o '^depends=.*' "$work/module" | tr -d '\0' | sed 's/^depends=//')
    mv "$work/module" "$work/module-$name"
    for other in ${depends//,/ }; do add_module "$other"; done
    count=$((count + 1))
    mv "$work/module-$name" "$work/root/modules/$(printf '%02d' "$count")-$name.ko"
}

copy_with_libraries() { # root, programs…
    local root=$1 program file
    shift
    for program in "$@"; do
        mkdir -p "$root/sbin"
        cp -L "$(command -v "$program")" "$root/sbin/$program"
        for file in $(with_libraries "$program" | tail -n +2); do
            mkdir -p "$root$(dirname "$file")"
            cp -L "$file" "$root$file"
        done
    done
}

# Files in order, owned by root, of one time, numbered by their place.
pack() { # root
    find "$1" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
    (cd "$1" && find . -mindepth 1 -print0 | sort -z \
        | unpacked cpio --create --null --format=newc --reproducible --owner=0:0 --quiet)
}

mkdir -p "$work"/root/{bin,sbin,etc,dev,proc,sys,tmp,mnt,modules,tests} "$work/more" "$work/out"
count=0
for module in "${modules[@]}"; do add_module "$module"; done
cp "$here/init" "$work/root/init"
cp "$here/lib.sh" "$here"/tests/*.sh "$work/root/tests/"
chmod 755 "$work/root/init"
copy_with_libraries "$work/root" "${disk_programs[@]}"
ln -s /sbin/busybox "$work/root/bin/sh"
echo "root:x:0:0:root:/:/bin/sh" >"$work/root/etc/passwd"
# What the first archive has is not there a second time.
copy_with_libraries "$work/more" fio
(cd "$work/more" && find . -type f | while read -r file; do [ ! -e "$work/root/$file" ] || rm "$file"; done)

vmlinuz=$(echo "$work"/packages/boot/vmlinu[xz]-"$kernel_version")
cp "$vmlinuz" "$work/out/kernel"
pack "$work/root" >"$work/base"
# The kernel unpacks one archive after the other. Uncompressed: an emulated CPU is slow at that.
{ cat "$work/base"; pack "$work/more"; } >"$work/out/initramfs"

# ---- the disk -------------------------------------------------------------------------------------------------------

# | sector 0: MBR | 1 MiB: FAT with syslinux, systemd-boot, kernel, initramfs (64 MiB) | 65 MiB: ext4, labelled root (31 MiB) |
make_disk() {
    local mib=1048576 fat=$work/fat ext=$work/ext disk=$work/out/disk.img boot=$work/packages
    local options="console=ttyS0,115200 loglevel=4 panic=-1 no_timer_check vold.test=booted"
    gzip -9 --no-name <"$work/base" >"$work/initramfs.gz"
    cat >"$work/syslinux.cfg" <<CFG
serial 0 115200
default vold
label vold
  linux /kernel
  initrd /initramfs.gz
  append $options
CFG
    cp "$boot/usr/lib/systemd/boot/efi/systemd-bootx64.efi" "$work/BOOTX64.EFI"
    echo "timeout 0" >"$work/loader.conf"
    cat >"$work/vold.conf" <<CFG
linux /kernel
initrd /initramfs.gz
options $options
CFG
    cp "$boot/usr/share/ovmf/OVMF.fd" "$work/out/firmware"
    truncate --size=64M "$fat"
    unpacked mkfs.fat -F 32 -i 564f4c44 -n BOOT --invariant -h 2048 "$fat" >/dev/null
    touch --date="@$SOURCE_DATE_EPOCH" "$work/out/kernel"
    touch --date="@$SOURCE_DATE_EPOCH" "$work"/{initramfs.gz,syslinux.cfg,BOOTX64.EFI,loader.conf,vold.conf}
    unpacked mcopy -m -i "$fat" "$work/out/kernel" "$work/initramfs.gz" "$work/syslinux.cfg" ::
    # Where UEFI looks when nobody has told it a boot loader; and where this one looks.
    unpacked mmd -i "$fat" ::/EFI ::/EFI/BOOT ::/loader ::/loader/entries
    unpacked mcopy -m -i "$fat" "$work/BOOTX64.EFI" ::/EFI/BOOT
    unpacked mcopy -m -i "$fat" "$work/loader.conf" ::/loader
    unpacked mcopy -m -i "$fat" "$work/vold.conf" ::/loader/entries
    unpacked syslinux --install "$fat"
    truncate --size=31M "$ext"
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -F -t ext4 -L root -U 566f6c64-0000-4000-8000-000000000001 \
        -E hash_seed=566f6c64-0000-4000-8000-000000000002,root_owner=0:0 "$ext"
    truncate --size=96M "$disk"
    dd if="$boot/usr/lib/syslinux/mbr/mbr.bin" of="$disk" conv=notrunc bs=440 count=1 status=none
    # Two entries: status, CHS (unused), type, CHS, first sector and sectors (little endian).
    printf '\x80\xfe\xff\xff\x0c\xfe\xff\xff\x00\x08\x00\x00\x00\x00\x02\x00%b' \
        '\x00\xfe\xff\xff\x83\xfe\xff\xff\x00\x08\x02\x00\x00\xf8\x00\x00' \
        | dd of="$disk" conv=notrunc bs=1 seek=446 status=none
    printf '\x55\xaa' | dd of="$disk" conv=notrunc bs=1 seek=510 status=none
    dd if="$fat" of="$disk" conv=notrunc,sparse bs=$mib seek=1 status=none
    dd if="$ext" of="$disk" conv=notrunc,sparse bs=$mib seek=65 status=none
}
[ "$what" = guest ] || make_disk

(cd "$work/out" && sha256sum ./*) >"$work/sums"
{ echo "$manifest"; cat "$work/sums"; } >"$work/out/manifest"
rm -rf "$out"
mv "$work/out" "$out"
say "done: $(du -sh "$out" | cut -f1)"
echo "$(cd "$out" && pwd)"
