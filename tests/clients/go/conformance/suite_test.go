// Package conformance judges a snapshotter behind a unix socket by containerd's own suite.
//
// The suite uses the same keys again and again, and asks for a snapshotter with an empty root for each subtest. So every
// subtest gets a server of its own, started from a command in which {root} and {socket} stand for places:
//
//	SNAPSHOTTER_COMMAND='hpmapper --root {root} serve --address {socket}' SNAPSHOTTER_NAME=overlayfs \
//	    TMPDIR=/a/file/system conformance.test -test.v
//
// The roots are made below TMPDIR. The name tells the suite what to expect: under "overlayfs" it leaves out the rename
// of a directory of a lower layer, which overlayfs refuses; under any other name it asks for it.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 60 * time.Second
)

var servers int64 // numbers the sockets

func TestConformance(t *testing.T) {
	command, name := os.Getenv("SNAPSHOTTER_COMMAND"), os.Getenv("SNAPSHOTTER_NAME")
	if command == "" || name == "" {
		t.Fatal("SNAPSHOTTER_COMMAND and SNAPSHOTTER_NAME must be set")
	}
	// Below /tmp, not below TMPDIR: the path of a socket has 107 bytes at most.
	sockets, err := os.MkdirTemp("/tmp", "conformance-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	factory := func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		socket := filepath.Join(sockets, fmt.Sprint(atomic.AddInt64(&servers, 1)))
		return start(command, root, socket, name)
	}
	testsuite.SnapshotterSuite(t, name, factory)
}

// start runs a server and returns a client of it, and what ends both.
//
// No Pdeathsig: it would kill the server as soon as the *thread* that started it ends, and containerd's mount package
// ends threads (it mounts from another directory in a thread that it throws away).
func start(command, root, socket, name string) (snapshots.Snapshotter, func() error, error) {
	words := strings.Fields(command)
	places := strings.NewReplacer("{root}", root, "{socket}", socket)
	for i, word := range words {
		words[i] = places.Replace(word)
	}
	server := exec.Command(words[0], words[1:]...)
	server.Stdout, server.Stderr = os.Stderr, os.Stderr
	if err := server.Start(); err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	if err := reachable(socket, ended); err != nil {
		server.Process.Kill()
		return nil, nil, err
	}
	// WithInsecure is the only spelling that Debian 12's grpc knows as well.
	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		server.Process.Kill()
		return nil, nil, err
	}
	stop := func() error {
		connection.Close()
		err := end(server, ended)
		return firstOf(err, unmountBelow(root))
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), name), stop, nil
}

// reachable waits until somebody listens on the socket.
func reachable(socket string, ended <-chan error) error {
	deadline := time.After(startTimeout)
	for {
		if connection, err := net.Dial("unix", socket); err == nil {
			return connection.Close()
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the server ended at its start: %v", err)
		case <-deadline:
			return errors.New("the server does not listen")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// end asks the server to stop. It must do so in time and without an error.
func end(server *exec.Cmd, ended <-chan error) error {
	if err := server.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("the server was gone already: %w", err)
	}
	select {
	case err := <-ended:
		if err != nil {
			return fmt.Errorf("the server stopped with an error: %w", err)
		}
		return nil
	case <-time.After(stopTimeout):
		server.Process.Kill()
		return errors.New("the server does not stop when it is asked to")
	}
}

// unmountBelow unmounts what the server has mounted in its root: a server may leave that to containers which live on.
func unmountBelow(root string) error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var below []string
	for _, line := range strings.Split(string(table), "\n") {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], root+"/") {
			below = append(below, fields[4])
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(below)))
	for _, target := range below {
		err = firstOf(err, mount.Unmount(target, syscall.MNT_DETACH))
	}
	return err
}

// firstOf is the first error, if there is any.
func firstOf(first, second error) error {
	if first == nil {
		return second
	}
	return first
}
