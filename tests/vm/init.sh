#!/bin/sh
# The guest's first process: mounts what a system has, runs the tests that the host chose, and powers off.
# The last line on the console is "VMEND n", n being pytest's exit status.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=/opt/python:/source/src HPMAPPER_GUEST=1

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /source
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs run /run
mkdir -p /run/lock/lvm
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
hostname guest
ip link set lo up 2>/dev/null || busybox ip link set lo up

modprobe virtio_blk
for disk in /sys/block/*/serial; do
    [ "$(cat "$disk")" = source ] && mount -o ro "/dev/$(basename "$(dirname "$disk")")" /source
done
echo VMREADY
cd /source && python3 -m tests.vm.inside
echo "VMEND $?"
sync
echo o >/proc/sysrq-trigger
sleep 60
