// slowfs serves one file over FUSE, slowly: what dm-delay would give, on kernels that lack it.
//
//	slowfs MICROSECONDS BYTES-PER-SECOND FUSE FILE
//
// The last two are open descriptors: /dev/fuse, mounted, and the file. Each read takes so long; waits run side by side, as in a device with a deep queue. All bytes pass at one rate. Writes
// pass at once. Ends when the mount does.
package main

import (
	"encoding/binary"
	"log"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Of struct fuse_in_header and its answers (include/uapi/linux/fuse.h).
const (
	opGetattr, opOpen, opRead, opWrite, opRelease, opFsync, opFlush, opInit = 3, 14, 15, 16, 18, 20, 25, 26
	opForget, opInterrupt, opBatchForget                                    = 2, 36, 42

	inHeader, outHeader, ioIn = 40, 16, 40
	most                      = 1 << 20
	threads                   = 64

	asyncRead, asyncDio, maxPages = 1 << 0, 1 << 15, 1 << 22
	directIO                      = 1
)

type server struct {
	fuse    int
	file    int
	latency time.Duration
	rate    float64
	lock    sync.Mutex
	freeAt  time.Time
}

func main() {
	// With whoever started it: the loop device on top would keep the mount, and so the server, for ever.
	syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0)
	s := &server{
		latency: time.Duration(number(1) * 1000),
		rate:    number(2),
		fuse:    int(number(3)),
		file:    int(number(4)),
	}
	var group sync.WaitGroup
	for i := 0; i < threads; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			s.serve()
		}()
	}
	group.Wait()
}

func number(argument int) float64 {
	value, err := strconv.ParseFloat(os.Args[argument], 64)
	if err != nil {
		log.Fatal(err)
	}
	return value
}

// serve answers requests until the mount is gone.
func (s *server) serve() {
	request := make([]byte, most+4096)
	answer := make([]byte, outHeader+most)
	for {
		count, err := syscall.Read(s.fuse, request)
		if err == syscall.ENODEV {
			return
		}
		if err != nil || count < inHeader {
			continue
		}
		operation := binary.LittleEndian.Uint32(request[4:])
		if operation == opForget || operation == opInterrupt || operation == opBatchForget {
			continue
		}
		size, errno := s.answer(operation, request[inHeader:count], answer[outHeader:])
		binary.LittleEndian.PutUint32(answer, uint32(outHeader+size))
		binary.LittleEndian.PutUint32(answer[4:], uint32(-int32(errno)))
		copy(answer[8:16], request[8:16]) // its number
		syscall.Write(s.fuse, answer[:outHeader+size])
	}
}

// answer fills in what is answered and returns its size, or an errno.
func (s *server) answer(operation uint32, in []byte, out []byte) (int, syscall.Errno) {
	switch operation {
	case opRead:
		offset, size := int64(binary.LittleEndian.Uint64(in[8:])), int(binary.LittleEndian.Uint32(in[16:]))
		s.wait(size)
		return result(syscall.Pread(s.file, out[:size], offset))
	case opWrite:
		offset, size := int64(binary.LittleEndian.Uint64(in[8:])), int(binary.LittleEndian.Uint32(in[16:]))
		count, errno := result(syscall.Pwrite(s.file, in[ioIn:ioIn+size], offset))
		binary.LittleEndian.PutUint64(out, uint64(count))
		return 8, errno
	case opInit:
		return initOut(out), 0
	case opGetattr:
		return s.attrOut(out)
	case opOpen:
		binary.LittleEndian.PutUint64(out, 1)
		binary.LittleEndian.PutUint64(out[8:], directIO)
		return 16, 0
	case opRelease, opFsync, opFlush:
		return 0, 0
	}
	return 0, syscall.ENOSYS
}

// wait lets latencies run side by side, and the bytes one after the other.
func (s *server) wait(size int) {
	now := time.Now()
	s.lock.Lock()
	if s.freeAt.Before(now) {
		s.freeAt = now
	}
	s.freeAt = s.freeAt.Add(time.Duration(float64(size) / s.rate * 1e9))
	due := s.freeAt
	s.lock.Unlock()
	if earliest := now.Add(s.latency); due.Before(earliest) {
		due = earliest
	}
	time.Sleep(due.Sub(now))
}

// initOut is struct fuse_init_out of protocol 7.31.
func initOut(out []byte) int {
	for i := range out[:64] {
		out[i] = 0
	}
	binary.LittleEndian.PutUint32(out, 7)
	binary.LittleEndian.PutUint32(out[4:], 31)
	binary.LittleEndian.PutUint32(out[8:], most) // read ahead
	binary.LittleEndian.PutUint32(out[12:], asyncRead|asyncDio|maxPages)
	binary.LittleEndian.PutUint16(out[16:], threads) // in the background
	binary.LittleEndian.PutUint16(out[18:], threads) // and from where on that is too much
	binary.LittleEndian.PutUint32(out[20:], most)    // a write
	binary.LittleEndian.PutUint32(out[24:], 1)       // nanoseconds of times
	binary.LittleEndian.PutUint16(out[28:], most/4096)
	return 64
}

// attrOut is struct fuse_attr_out: a regular file of the size that it is.
func (s *server) attrOut(out []byte) (int, syscall.Errno) {
	var status syscall.Stat_t
	if err := syscall.Fstat(s.file, &status); err != nil {
		return 0, err.(syscall.Errno)
	}
	for i := range out[:104] {
		out[i] = 0
	}
	binary.LittleEndian.PutUint64(out, 3600) // how long it holds, in seconds
	binary.LittleEndian.PutUint64(out[16:], 1)
	binary.LittleEndian.PutUint64(out[24:], uint64(status.Size))
	binary.LittleEndian.PutUint64(out[32:], uint64(status.Size/512))
	binary.LittleEndian.PutUint32(out[76:], syscall.S_IFREG|0o600)
	binary.LittleEndian.PutUint32(out[80:], 1)
	binary.LittleEndian.PutUint32(out[96:], 4096)
	return 104, 0
}

func result(count int, err error) (int, syscall.Errno) {
	if err != nil {
		return 0, err.(syscall.Errno)
	}
	return count, 0
}
