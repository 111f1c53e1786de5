package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/mount"
)

const (
	layersInChain = 16
	fileSize      = 1 << 20
)

// What is done to the files a to j in a layer: n writes the file anew, u overwrites four bytes in its middle, which
// makes overlayfs copy it up, - deletes it, and a dot leaves it alone. These are the patterns of containerd's benchsuite
// (core/snapshots/benchsuite), so that figures can be set beside published ones.
const (
	everyThird  = "uunuun-nun"
	everySecond = "un-nu-nunu"
	others      = "nnnnnnnnnn"
)

func pattern(layer int) string {
	switch {
	case layer%3 == 0:
		return everyThird
	case layer%2 == 0:
		return everySecond
	}
	return others
}

// layers commits a chain of layers over an empty parent and removes it again. containerd's suite lets the chain of
// one repetition grow on that of the one before, and removes nothing: its figures therefore rise with the count.
func (b *bench) layers(ctx context.Context, client, i int) error {
	var parents []string
	parent := ""
	for layer := 1; layer <= layersInChain; layer++ {
		name, err := b.layer(ctx, i, layer, parent)
		if err != nil {
			return err
		}
		parents, parent = append(parents, name), name
	}
	for n := len(parents) - 1; n >= 0; n-- {
		if err := b.times.step("remove", func() error { return b.snapshotter.Remove(ctx, parents[n]) }); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) layer(ctx context.Context, i, layer int, parent string) (string, error) {
	key := fmt.Sprintf("%s-layer-%d", b.key(i), layer)
	var mounts []mount.Mount
	err := b.times.step("prepare", func() (err error) {
		mounts, err = b.snapshotter.Prepare(ctx, key, parent)
		return err
	})
	if err != nil {
		return "", err
	}
	write := func(root string) error { return apply(root, pattern(layer)) }
	if err := b.times.step("write", func() error { return mount.WithTempMount(ctx, mounts, write) }); err != nil {
		return "", err
	}
	name := key + "-committed"
	return name, b.times.step("commit", func() error { return b.snapshotter.Commit(ctx, name, key) })
}

func apply(root, pattern string) error {
	for i, action := range pattern {
		path := filepath.Join(root, string(rune('a'+i)))
		var err error
		switch action {
		case 'n':
			err = writeAnew(path)
		case 'u':
			err = overwriteMiddle(path)
		case '-':
			err = os.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeAnew(path string) error {
	content := make([]byte, fileSize)
	if _, err := rand.Read(content); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o777)
}

func overwriteMiddle(path string) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteAt([]byte{1, 2, 3, 4}, fileSize/2)
	return err
}
