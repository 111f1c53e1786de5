// Rpcbench puts load on a snapshotter behind a unix socket and prints what it measured as JSON.
//
// All clients share one connection, as all callers inside containerd do. Each mode is a list of steps; a client runs
// the steps one after the other, and every step is timed by itself.
//
//	stat    Stat of a committed snapshot
//	cycle   Prepare, Commit, Remove
//	active  Prepare, Mounts, Remove
//	layers  chains of 16 layers of 1 MiB files, like containerd's benchsuite: see layers.go
//
// With -mount, cycle and active also mount what Prepare returned, and unmount it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

type bench struct {
	snapshotter snapshots.Snapshotter
	clients     int
	count       int
	mounting    bool
	places      string // directory with one mount point for each client
	unique      string // prefix of all keys, so that a server can be measured again and again
	base        string // committed snapshot that the modes but layers work upon
	times       *times
}

func main() {
	address := flag.String("address", "", "unix socket of the snapshotter")
	name := flag.String("snapshotter", "bench", "name to ask for, where a server has several")
	mode := flag.String("mode", "cycle", "stat, cycle, active or layers")
	clients := flag.Int("clients", 1, "clients at once")
	count := flag.Int("count", 1000, "repetitions, over all clients")
	warmup := flag.Int("warmup", 50, "repetitions before the measured ones")
	depth := flag.Int("depth", 1, "committed snapshots below the one that is worked upon")
	mounting := flag.Bool("mount", false, "also mount and unmount what Prepare returned")
	pid := flag.Int("pid", 0, "the server's process: measure its CPU time too")
	flag.Parse()

	// WithInsecure is the only spelling that Debian 12's grpc knows as well.
	connection, err := grpc.Dial("unix://"+*address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	places, err := os.MkdirTemp("", "rpcbench-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(places)
	b := &bench{
		snapshotter: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), *name),
		clients:     *clients, count: *count, mounting: *mounting, places: places,
		unique: fmt.Sprintf("bench-%d-%d", os.Getpid(), time.Now().UnixNano()),
	}
	result, err := b.measure(*mode, *warmup, *depth, *pid)
	if err != nil {
		os.RemoveAll(places)
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

func namespaced() context.Context {
	return metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", "bench")
}

// measure makes what the mode works upon, warms up, runs the mode, and removes everything again.
func (b *bench) measure(mode string, warmup, depth, pid int) (_ *result, err error) {
	modes := map[string]func(ctx context.Context, client, i int) error{
		"stat": b.stat, "cycle": b.cycle, "active": b.active, "layers": b.layers,
	}
	run, ok := modes[mode]
	if !ok {
		return nil, fmt.Errorf("no mode %q", mode)
	}
	ctx := namespaced()
	made, err := b.chain(ctx, depth)
	defer func() {
		for i := len(made) - 1; i >= 0; i-- {
			if e := b.snapshotter.Remove(ctx, made[i]); e != nil && err == nil {
				err = e
			}
		}
		if cleaner, ok := b.snapshotter.(snapshots.Cleaner); ok {
			cleaner.Cleanup(ctx) // a server may have none
		}
	}()
	if err != nil {
		return nil, err
	}
	for client := 0; client < b.clients; client++ {
		if err := os.MkdirAll(b.place(client), 0o700); err != nil {
			return nil, err
		}
	}
	b.times = newTimes()
	if err := b.parallel(ctx, -warmup, 0, run); err != nil {
		return nil, err
	}
	b.times = newTimes()
	cpu, start := cpuSeconds(pid), time.Now()
	if err := b.parallel(ctx, 0, b.count, run); err != nil {
		return nil, err
	}
	seconds := time.Since(start).Seconds()
	return &result{
		Mode: mode, Clients: b.clients, Count: b.count, Mounting: b.mounting, Depth: depth, Seconds: seconds,
		Rate: float64(b.count) / seconds, ServerCPU: cpuSeconds(pid) - cpu, Steps: b.times.summary(),
	}, nil
}

// parallel runs a mode for the numbers from first to last, spread over the clients.
func (b *bench) parallel(ctx context.Context, first, last int, run func(context.Context, int, int) error) error {
	var (
		group  sync.WaitGroup
		next   = int64(first) - 1
		failed atomic.Value
	)
	for client := 0; client < b.clients; client++ {
		group.Add(1)
		go func(client int) {
			defer group.Done()
			for failed.Load() == nil {
				i := atomic.AddInt64(&next, 1)
				if i >= int64(last) {
					return
				}
				if err := run(ctx, client, int(i)); err != nil {
					failed.Store(fmt.Errorf("repetition %d: %w", i, err))
				}
			}
		}(client)
	}
	group.Wait()
	if err, ok := failed.Load().(error); ok {
		return err
	}
	return nil
}

// chain commits a chain of `depth` snapshots with one small file each, and names them from the bottom up.
func (b *bench) chain(ctx context.Context, depth int) (made []string, err error) {
	for i := 0; i < depth; i++ {
		key, name := fmt.Sprintf("%s-base-%d-active", b.unique, i), fmt.Sprintf("%s-base-%d", b.unique, i)
		mounts, err := b.snapshotter.Prepare(ctx, key, b.base)
		if err != nil {
			return made, err
		}
		fill := func(root string) error {
			return os.WriteFile(filepath.Join(root, fmt.Sprintf("file-%d", i)), []byte("content\n"), 0o644)
		}
		if err := mount.WithTempMount(ctx, mounts, fill); err != nil {
			return append(made, key), err
		}
		if err := b.snapshotter.Commit(ctx, name, key); err != nil {
			return append(made, key), err
		}
		made, b.base = append(made, name), name
	}
	return made, nil
}

func (b *bench) place(client int) string { return filepath.Join(b.places, fmt.Sprint(client)) }

func (b *bench) key(i int) string { return fmt.Sprintf("%s/%d", b.unique, i) }

func (b *bench) stat(ctx context.Context, client, i int) error {
	return b.times.step("stat", func() error {
		_, err := b.snapshotter.Stat(ctx, b.base)
		return err
	})
}

func (b *bench) cycle(ctx context.Context, client, i int) error {
	if err := b.prepare(ctx, client, i); err != nil {
		return err
	}
	name := b.key(i) + "-committed"
	if err := b.times.step("commit", func() error { return b.snapshotter.Commit(ctx, name, b.key(i)) }); err != nil {
		return err
	}
	return b.times.step("remove", func() error { return b.snapshotter.Remove(ctx, name) })
}

func (b *bench) active(ctx context.Context, client, i int) error {
	if err := b.prepare(ctx, client, i); err != nil {
		return err
	}
	err := b.times.step("mounts", func() error {
		_, err := b.snapshotter.Mounts(ctx, b.key(i))
		return err
	})
	if err != nil {
		return err
	}
	return b.times.step("remove", func() error { return b.snapshotter.Remove(ctx, b.key(i)) })
}

// prepare makes an active snapshot and, when asked to, mounts it once.
func (b *bench) prepare(ctx context.Context, client, i int) error {
	var mounts []mount.Mount
	err := b.times.step("prepare", func() (err error) {
		mounts, err = b.snapshotter.Prepare(ctx, b.key(i), b.base)
		return err
	})
	if err != nil || !b.mounting {
		return err
	}
	if err := b.times.step("mount", func() error { return mount.All(mounts, b.place(client)) }); err != nil {
		return err
	}
	return b.times.step("unmount", func() error { return mount.UnmountAll(b.place(client), 0) })
}
