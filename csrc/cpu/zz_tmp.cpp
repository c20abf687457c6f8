#include <ATen/ATen.h>
#include "rnn_cell_cpu.h"
namespace rnn_ext::cpu {
template <typename T> double ld(const Matrix<T>& m, int64_t r, int64_t c) { return double(m.data[r*m.row_stride + c*m.col_stride]); }
template <typename T> void rnn_cell_forward(const ForwardParams<T>& p) {
  for (int64_t b=0;b<p.batch;b++) for (int64_t n=0;n<p.hidden_size;n++) { double z=0;
    for (int64_t k=0;k<p.input_size;k++) z+=ld(p.input,b,k)*ld(p.weight_ih,n,k);
    if (p.hx.data) for (int64_t k=0;k<p.hidden_size;k++) z+=ld(p.hx,b,k)*ld(p.weight_hh,n,k);
    if (p.bias_ih) z+=double(p.bias_ih[n]); if (p.bias_hh) z+=double(p.bias_hh[n]);
    p.output[b*p.hidden_size+n]=T(p.nonlinearity==Nonlinearity::kTanh?std::tanh(z):p.nonlinearity==Nonlinearity::kRelu?(z<0?0:z):1/(1+std::exp(-z))); } }
template <typename T> void rnn_cell_backward(const BackwardParams<T>& p) {
  int64_t B=p.batch,I=p.input_size,H=p.hidden_size; std::vector<double> dz(B*H);
  for (int64_t b=0;b<B;b++) for (int64_t n=0;n<H;n++) { double g=ld(p.grad_output,b,n),y=ld(p.output,b,n);
    dz[b*H+n]=p.nonlinearity==Nonlinearity::kTanh?g*(1-y*y):p.nonlinearity==Nonlinearity::kRelu?(y<=0?0:g):g*y*(1-y); }
  auto data=[&](T* o,const Matrix<T>&w,int64_t N){ if(o) for(int64_t b=0;b<B;b++) for(int64_t n=0;n<N;n++){double s=0; for(int64_t k=0;k<H;k++) s+=dz[b*H+k]*ld(w,k,n); o[b*N+n]=T(s);} };
  data(p.grad_input,p.weight_ih,I); data(p.grad_hx,p.weight_hh,H);
  auto wt=[&](T* o,const Matrix<T>&x,int64_t N){ if(o) for(int64_t m=0;m<H;m++) for(int64_t n=0;n<N;n++){double s=0; if(x.data) for(int64_t b=0;b<B;b++) s+=dz[b*H+m]*ld(x,b,n); o[m*N+n]=T(s);} };
  wt(p.grad_weight_ih,p.input,I); wt(p.grad_weight_hh,p.hx,H);
  if(p.grad_bias) for(int64_t m=0;m<H;m++){double s=0; for(int64_t b=0;b<B;b++) s+=dz[b*H+m]; p.grad_bias[m]=T(s);} }
#define X(T) template void rnn_cell_forward(const ForwardParams<T>&); template void rnn_cell_backward(const BackwardParams<T>&);
X(float) X(double) X(c10::BFloat16) X(c10::Half)
const char* cpu_capability(){return "default";}
}
