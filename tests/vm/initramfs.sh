#!/bin/busybox sh
# shellcheck shell=dash
# The guest's initramfs: finds the disk with the serial number "root", and starts the system on it.

export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
insmod /virtio_blk.ko
for serial in /sys/block/*/serial; do
    [ "$(cat "$serial")" = root ] && disk=$(basename "$(dirname "$serial")")
done
mount -t ext4 "/dev/$disk" /root
umount /sys /dev
exec switch_root /root /sbin/vminit
