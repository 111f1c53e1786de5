// Snapserver serves one of containerd's own snapshotters on a unix socket, as a proxy plugin does.
//
// It is the peer that our daemon is measured against: the same protocol and the same transport around containerd's
// own overlayfs.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/native"
	"github.com/containerd/containerd/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	kind := flag.String("type", "overlay", "snapshotter: overlay or native")
	root := flag.String("root", "", "directory for the snapshots")
	address := flag.String("address", "", "unix socket to serve on")
	async := flag.Bool("async-remove", false, "leave directories to Cleanup, as containerd configures overlayfs")
	flag.Parse()
	if err := serve(*kind, *root, *address, *async); err != nil {
		log.Fatal(err)
	}
}

func serve(kind, root, address string, async bool) error {
	snapshotter, err := open(kind, root, async)
	if err != nil {
		return fmt.Errorf("cannot open %s in %q: %w", kind, root, err)
	}
	defer snapshotter.Close()
	if err := os.Remove(address); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		server.GracefulStop()
	}()
	return server.Serve(listener)
}

func open(kind, root string, async bool) (snapshots.Snapshotter, error) {
	switch kind {
	case "overlay":
		var options []overlay.Opt
		if async {
			options = append(options, overlay.AsynchronousRemove)
		}
		return overlay.NewSnapshotter(root, options...)
	case "native":
		return native.NewSnapshotter(root)
	}
	return nil, fmt.Errorf("no snapshotter of type %q", kind)
}
